// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"encoding/binary"
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// offloaded sends a frame whose header for the device asks it to write the
// checksum of all from start on at start plus offset: long after every filter
// has read the frame.
func (b *box) offloaded(frame []byte, start, offset uint16) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	hdr := []byte{1, 0, 0, 0, 0, 0} // VIRTIO_NET_HDR_F_NEEDS_CSUM
	hdr = binary.NativeEndian.AppendUint16(hdr, start)
	hdr = binary.NativeEndian.AppendUint16(hdr, offset)
	return errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.Sendto(fd, append(hdr, frame...), 0, &unix.SockaddrLinklayer{Ifindex: b.inside, Halen: 6}),
		unix.Close(fd),
	)
}

// A port that a checksum is written over. The frame says 443 to the program
// and 9999 to who gets it. It takes a packet socket, and no program can see it
// come: what holds is that a sandbox cannot open one.
func TestForgedChecksumOffload(t *testing.T) {
	n := theWorld(t)
	noOffload(t, "up0", 0)
	t.Cleanup(func() { noOffload(t, "up0", 1) })
	const wanted = 9999
	n.hearUDP(t, n.far, other4, wanted)
	forge := func(b *box, k token) []byte {
		f := packet{dst: other4, port: 443, payload: append(k[:], 0, 0), badSum: true}.from(b)
		// The last two bytes make the checksum of UDP header and payload the port.
		sum := checksum(f[34:], wanted)
		binary.BigEndian.PutUint16(f[len(f)-2:], sum)
		return f
	}
	// The tap of the internet hears the frame in any case; the second time is
	// the socket at the port.
	k := newToken()
	n.await(k)
	defer n.forget(k)
	must(t, in(n.open.ns, func() error { return n.open.offloaded(forge(n.open, k), 34, 2) }))
	if got := n.waitFor(k, 2, patience); got != 2 {
		t.Errorf("control: the frame was heard %d times, want 2", got)
	}

	b := n.sandbox(t, "- {name: web, action: allow, to: [{cidr: 203.0.113.0/24}], ports: [443/udp]}\n")
	k2 := newToken()
	n.await(k2)
	defer n.forget(k2)
	err := in(b.ns, func() error {
		if err := dropNetRaw(); err != nil {
			return err
		}
		return b.offloaded(forge(b, k2), 34, 2)
	})
	if !errors.Is(err, unix.EPERM) {
		t.Errorf("packet socket without CAP_NET_RAW: got %v, want EPERM", err)
	}
	b.pass(t)
	if got := n.count(k2); got != 0 {
		t.Errorf("arrived %d times", got)
	}
}

// dropNetRaw takes CAP_NET_RAW from this thread, as from every process of a
// sandbox.
func dropNetRaw() error {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&h, &caps[0]); err != nil {
		return err
	}
	const bit = uint32(1) << unix.CAP_NET_RAW
	caps[0].Effective &^= bit
	caps[0].Permitted &^= bit
	return unix.Capset(&h, &caps[0])
}
