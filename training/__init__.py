"""What learns, reads data and scores."""
