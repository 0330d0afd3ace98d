// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From linux/io_uring.h.
const (
	opSendMsg      = 9
	ringOffSQRing  = 0
	ringOffSQEs    = 0x10000000
	ringOffCQRing  = 0x8000000
	ringGetEvents  = 1
	ringSubmission = 64 // bytes of struct io_uring_sqe
)

// ringParams is struct io_uring_params.
type ringParams struct {
	sqEntries, cqEntries, flags, cpu, idle, features, wq uint32
	_                                                    [3]uint32
	sq                                                   struct {
		head, tail, mask, entries, flags, dropped, array, _ uint32
		_                                                   uint64
	}
	cq struct {
		head, tail, mask, entries, overflow, cqes, flags, _ uint32
		_                                                   uint64
	}
}

// ringSend sends one datagram through an io_uring: no system call of the
// socket is made.
func ringSend(fd int, body []byte, to *unix.SockaddrInet4) error {
	var p ringParams
	ring, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return fmt.Errorf("io_uring_setup: %w", errno)
	}
	defer unix.Close(int(ring))
	sq, err := unix.Mmap(int(ring), ringOffSQRing, int(p.sq.array+4*p.sqEntries), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(sq) }()
	cq, err := unix.Mmap(int(ring), ringOffCQRing, int(p.cq.cqes+16*p.cqEntries), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(cq) }()
	sqes, err := unix.Mmap(int(ring), ringOffSQEs, int(ringSubmission*p.sqEntries), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(sqes) }()

	name := unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: to.Addr}
	port := (*[2]byte)(unsafe.Pointer(&name.Port))
	port[0], port[1] = byte(to.Port>>8), byte(to.Port)
	iov := unix.Iovec{Base: &body[0]}
	iov.SetLen(len(body))
	msg := unix.Msghdr{Name: (*byte)(unsafe.Pointer(&name)), Namelen: unix.SizeofSockaddrInet4, Iov: &iov, Iovlen: 1}
	var pin runtime.Pinner // the kernel reads them while the ring is entered
	defer pin.Unpin()
	for _, v := range []any{&name, &iov, &body[0], &msg} {
		pin.Pin(v)
	}
	sqes[0] = opSendMsg
	*(*int32)(unsafe.Pointer(&sqes[4])) = int32(fd)
	*(*uint64)(unsafe.Pointer(&sqes[16])) = uint64(uintptr(unsafe.Pointer(&msg)))
	*(*uint32)(unsafe.Pointer(&sqes[24])) = 1
	*(*uint32)(unsafe.Pointer(&sq[p.sq.array])) = 0
	*(*uint32)(unsafe.Pointer(&sq[p.sq.tail]))++
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, ring, 1, 1, ringGetEvents, 0, 0); errno != 0 {
		return fmt.Errorf("io_uring_enter: %w", errno)
	}
	if res := *(*int32)(unsafe.Pointer(&cq[p.cq.cqes+8])); res < 0 {
		return fmt.Errorf("send through io_uring: %w", unix.Errno(-res))
	}
	return nil
}
