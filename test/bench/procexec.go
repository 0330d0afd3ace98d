// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Of linux/connector.h and linux/cn_proc.h.
const (
	cnIdxProc, cnValProc = 1, 1
	procMcastListen      = 1
	procEventExec        = 2

	nlHeader = unix.SizeofNlMsghdr // 16
	cnHeader = 20                  // struct cn_msg without its data
	// struct proc_event: what, cpu, timestamp, then the event's own data.
	eventWhat  = nlHeader + cnHeader
	eventTime  = eventWhat + 8
	eventTgid  = eventWhat + 16 + 4
	eventBytes = eventWhat + 24
)

// execs listens to the kernel's own word that a process has executed a
// program: the proc connector's PROC_EVENT_EXEC, sent by the execve itself once
// the new program is loaded and before its first instruction. The time in it
// is CLOCK_MONOTONIC in the kernel, so neither the reader's scheduling nor any
// polling adds to what is measured, and it is the same for everybody's
// containers. What lies between it and the first instruction is the return
// from execve, well below 0.1 ms.
//
// It needs CAP_NET_ADMIN and the initial pid and user namespaces.
type execs struct {
	fd   int
	done chan struct{} // closed by the reader

	mu   sync.Mutex
	last map[int]int64 // by process id: when it last executed something; +checklocks:mu
	err  error         // +checklocks:mu
}

// monotonic is the clock of exec events, in ns.
func monotonic() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic("CLOCK_MONOTONIC: " + err.Error())
	}
	return ts.Nano()
}

func openExecs() (*execs, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_CONNECTOR)
	if err != nil {
		return nil, fmt.Errorf("open proc connector: %w", err)
	}
	e := &execs{fd: fd, done: make(chan struct{}), last: map[int]int64{}}
	if err := e.listen(); err != nil {
		return nil, errors.Join(fmt.Errorf("open proc connector: %w", err), unix.Close(fd))
	}
	go e.read()
	return e, nil
}

func (e *execs) listen() error {
	// Other work on the machine forks too; nothing must be lost.
	if err := unix.SetsockoptInt(e.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20); err != nil {
		return err
	}
	// So that the reader notices close.
	tv := unix.NsecToTimeval((100 * time.Millisecond).Nanoseconds())
	if err := unix.SetsockoptTimeval(e.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return err
	}
	if err := unix.Bind(e.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: cnIdxProc}); err != nil {
		return err
	}
	msg := make([]byte, nlHeader+cnHeader+4)
	order := binary.NativeEndian
	order.PutUint32(msg[0:], uint32(len(msg)))
	order.PutUint16(msg[4:], unix.NLMSG_DONE)
	order.PutUint32(msg[12:], uint32(os.Getpid()))
	order.PutUint32(msg[nlHeader:], cnIdxProc)
	order.PutUint32(msg[nlHeader+4:], cnValProc)
	order.PutUint16(msg[nlHeader+16:], 4) // length of the data
	order.PutUint32(msg[nlHeader+cnHeader:], procMcastListen)
	return unix.Sendto(e.fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

func (e *execs) read() {
	buf := make([]byte, 4096)
	for {
		n, _, err := unix.Recvfrom(e.fd, buf, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			select {
			case <-e.done:
				return
			default:
				continue
			}
		case err != nil:
			e.mu.Lock()
			e.err = fmt.Errorf("read proc connector: %w", err)
			e.mu.Unlock()
			return
		}
		if n < eventBytes || binary.NativeEndian.Uint32(buf[eventWhat:]) != procEventExec {
			continue
		}
		e.mu.Lock()
		e.last[int(binary.NativeEndian.Uint32(buf[eventTgid:]))] = int64(binary.NativeEndian.Uint64(buf[eventTime:]))
		e.mu.Unlock()
	}
}

// since answers how long after begin, a time of monotonic, a process executed
// its program. It waits for the event, which may arrive after the news of it.
func (e *execs) since(begin int64, pid int) (time.Duration, error) {
	for range 2000 {
		e.mu.Lock()
		at, err := e.last[pid], e.err
		e.mu.Unlock()
		if err != nil {
			return 0, err
		}
		if at > begin {
			return time.Duration(at - begin), nil
		}
		time.Sleep(time.Millisecond)
	}
	return 0, fmt.Errorf("process %d has executed nothing", pid)
}

func (e *execs) close() error {
	close(e.done)
	return unix.Close(e.fd)
}
