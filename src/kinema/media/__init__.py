"""Pictures and films as files: input images in, MP4 out."""
