"""What the HTTP server shows beyond OpenAI's API: a page, facts, metrics; and who may ask."""
