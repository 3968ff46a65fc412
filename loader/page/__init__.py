"""The load page: one HTML file that says what a load did, made from the JSON of its report."""
