"""What makes a notebook run: assets, the record of a run, the runner, publishing, the page of results."""
