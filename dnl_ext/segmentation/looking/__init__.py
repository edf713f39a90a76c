"""The attention of trained networks: pictures of single images, and measurements over a data set."""
