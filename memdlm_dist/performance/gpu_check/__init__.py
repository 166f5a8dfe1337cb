"""The check of a machine with accelerators: sections, their results, one report."""
