"""What each part is worth: ablations, and accuracy against length."""
