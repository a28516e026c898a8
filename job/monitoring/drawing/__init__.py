"""Charts and grids of images, drawn with Pillow."""
