"""Check of a machine with accelerators: sections, their results, and one report."""
