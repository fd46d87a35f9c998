"""Routes beside OpenAI's: a page, facts and metrics; and the guard before all of them."""
