"""Everything that becomes a Program."""
