"""The finished models as one object and one folder, and the folders of images that it samples."""
