"""What a result file says: as tables, as a page, and against another one."""
