"""Everything that more than one paper needs."""
