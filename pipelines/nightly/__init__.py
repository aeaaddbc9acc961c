"""Run the nightly job: new and changed items get SIDs, published ones stay, a bad table is refused. Also roll back and
maintain published generations."""
