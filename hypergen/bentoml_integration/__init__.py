"""Everything that feeds or patches BentoML."""
