"""What shows a run to people while it goes on."""
