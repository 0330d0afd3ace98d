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

// shared is an array map of T in this process's memory. The programs see
// single stores, which a map update through the kernel does not promise, and
// no system call is needed.
type shared[T any] struct {
	mem    []byte
	values []T
}

// mapShared maps n values of m.
func mapShared[T any](m *ebpf.Map, n uint32) (shared[T], error) {
	var zero T
	mem, err := unix.Mmap(m.FD(), 0, int(n)*int(unsafe.Sizeof(zero)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return shared[T]{}, fmt.Errorf("map %s into memory: %w", m, err)
	}
	return shared[T]{mem, unsafe.Slice((*T)(unsafe.Pointer(&mem[0])), n)}, nil
}

func (s *shared[T]) close() error {
	if s.mem == nil {
		return nil
	}
	mem := s.mem
	s.mem, s.values = nil, nil
	return unix.Munmap(mem)
}

// sharedSlots is the map slots.
type sharedSlots struct{ shared[bpf.DatapathBhSlot] }

// id is that of the sandbox in slot n; "" if the slot is free.
func (s *sharedSlots) id(n uint32) string {
	id, _, _ := bytes.Cut(s.values[n].Id[:], []byte{0})
	return string(id)
}

func (s *sharedSlots) setID(n uint32, id string) {
	var b [len(s.values[n].Id)]uint8
	copy(b[:], id)
	s.values[n].Id = b
}

func (s *sharedSlots) ifindex(n uint32) uint32 { return atomic.LoadUint32(&s.values[n].Ifindex) }

// setIfindex opens the slot for the link, or closes it with 0. Everything
// written to the slot before is visible to a program that sees the ifindex.
func (s *sharedSlots) setIfindex(n, ifindex uint32) {
	atomic.StoreUint32(&s.values[n].Ifindex, ifindex)
}

// policy is the index of the policy in force; 0 if there is none.
func (s *sharedSlots) policy(n uint32) uint32 {
	return uint32(atomic.LoadUint64(&s.values[n].Policy))
}

// setPolicy swaps the policy of the slot by one store. The generation must be
// one that was never used.
func (s *sharedSlots) setPolicy(n, generation, policy uint32) {
	atomic.StoreUint64(&s.values[n].Policy, uint64(generation)<<32|uint64(policy))
}
