"""AMD devices through amdsmi."""
