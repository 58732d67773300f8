"""What people see, a module a page."""
