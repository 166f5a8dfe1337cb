"""TOML sections, parsing, and checks of what a configuration alone can tell."""
