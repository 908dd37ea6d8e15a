"""Images from files and folders, and checks of them, with NumPy and Pillow alone."""
