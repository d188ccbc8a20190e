"""Image conditioning: img2img, inpainting and ControlNet."""
