"""TOML sections, parsing, resolution at launch and checks of the configuration."""
