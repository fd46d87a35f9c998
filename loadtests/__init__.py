"""Load tests with locust: does memory stay flat as loops deepen, on a real server, for hours?"""
