"""What the server withstands: `python -m scripts.soak`."""
