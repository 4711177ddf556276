"""Pictures, films and sound as files: what clients send in, MP4, WebM and GIF out."""
