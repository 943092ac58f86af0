"""What one paper alone needs, one file or folder a paper; nothing on the shared shelf imports from here."""
