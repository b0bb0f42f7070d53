"""What is never trained here: VAEs, text and image encoders, and how their folders are read."""
