"""A student for one runtime: `export.export`, profiles, targets and the check of each export."""
