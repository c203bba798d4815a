//! Devices of the PC that a virtual machine still needs.
