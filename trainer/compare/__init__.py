"""`trainer compare`: runs beside each other, as tables and as a report."""
