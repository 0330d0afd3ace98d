// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"bytes"
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/bpf"
)

// sharedSlots is the map slots in this process's memory. The programs see
// single stores, which a map update through the kernel does not promise, and
// no system call is needed.
type sharedSlots struct {
	mem   []byte
	slots []bpf.DatapathBhSlot
}

// mapSlots maps n slots of m.
func mapSlots(m *ebpf.Map, n uint32) (sharedSlots, error) {
	size := int(n) * int(unsafe.Sizeof(bpf.DatapathBhSlot{}))
	mem, err := unix.Mmap(m.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return sharedSlots{}, fmt.Errorf("map slots into memory: %w", err)
	}
	return sharedSlots{mem, unsafe.Slice((*bpf.DatapathBhSlot)(unsafe.Pointer(&mem[0])), n)}, nil
}

func (s *sharedSlots) close() error {
	if s.mem == nil {
		return nil
	}
	mem := s.mem
	s.mem, s.slots = nil, nil
	return unix.Munmap(mem)
}

// id is that of the sandbox in slot n; "" if the slot is free.
func (s *sharedSlots) id(n uint32) string {
	id, _, _ := bytes.Cut(s.slots[n].Id[:], []byte{0})
	return string(id)
}

func (s *sharedSlots) setID(n uint32, id string) {
	var b [len(s.slots[n].Id)]uint8
	copy(b[:], id)
	s.slots[n].Id = b
}

func (s *sharedSlots) ifindex(n uint32) uint32 { return atomic.LoadUint32(&s.slots[n].Ifindex) }

// setIfindex opens the slot for the link, or closes it with 0. Everything
// written to the slot before is visible to a program that sees the ifindex.
func (s *sharedSlots) setIfindex(n, ifindex uint32) {
	atomic.StoreUint32(&s.slots[n].Ifindex, ifindex)
}

func (s *sharedSlots) policy(n uint32) uint32 { return atomic.LoadUint32(&s.slots[n].Policy) }

// setPolicy swaps the policy of the slot by one store.
func (s *sharedSlots) setPolicy(n, policy uint32) {
	atomic.StoreUint32(&s.slots[n].Policy, policy)
}
