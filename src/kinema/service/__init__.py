"""What every frontend needs: jobs accepted, dispatched, expired and told of."""
