"""Records as JSON, the files beside them, and the tables, sentences and figures made of records. No torch."""
