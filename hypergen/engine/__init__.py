"""The engine process: it loads the models and generates the images."""
