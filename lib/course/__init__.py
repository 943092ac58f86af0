"""What makes a notebook run and what it reads: nothing here is about learning from feedback itself."""
