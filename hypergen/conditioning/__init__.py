"""What steers an image besides its prompt: a picture to begin from, a mask, a control model."""
