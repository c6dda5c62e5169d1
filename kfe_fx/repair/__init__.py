"""Repair after a removal in closed form: what the layers that are left are fitted to, and how."""
