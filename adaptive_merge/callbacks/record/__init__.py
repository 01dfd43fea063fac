"""What a run notes while it goes on."""
