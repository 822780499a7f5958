//! Frames to groups (broadcast, multicast), copied to us by an AF_PACKET socket while the host gets them too.
