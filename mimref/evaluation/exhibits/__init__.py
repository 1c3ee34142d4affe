"""What a report shows of the images themselves."""
