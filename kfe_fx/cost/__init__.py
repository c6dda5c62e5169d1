"""What a network costs, and which units go to meet a budget."""
