"""Model families: one file each, through diffusers' own modules."""
