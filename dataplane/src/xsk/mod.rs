//! AF_XDP: the kernel interface, rings, UMEM registration and sockets.
