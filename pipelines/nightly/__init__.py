"""The nightly job: new and changed items get SIDs, published ones stay, a bad table is refused; and the upkeep of what
was published."""
