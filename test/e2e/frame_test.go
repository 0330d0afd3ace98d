// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/test/rig"
)

// frame is one UDP datagram with an Ethernet header, and ways to spoil it.
type frame struct {
	dst, src  net.HardwareAddr
	from, to  netip.Addr
	port      uint16
	proto     byte
	ethertype uint16
	fragment  bool
	vlan      bool
}

func (f frame) with(change func(*frame)) frame {
	change(&f)
	return f
}

func (f frame) bytes() []byte {
	payload := []byte("forged datagram")
	udp := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(udp, 40000)
	binary.BigEndian.PutUint16(udp[2:], f.port)
	binary.BigEndian.PutUint16(udp[4:], uint16(8+len(payload)))
	udp = append(udp, payload...)

	var ip []byte
	ethertype := uint16(unix.ETH_P_IP)
	if f.to.Is4() {
		ip = make([]byte, 20)
		ip[0], ip[8], ip[9] = 0x45, 64, f.proto
		binary.BigEndian.PutUint16(ip[2:], uint16(20+len(udp)))
		if f.fragment {
			binary.BigEndian.PutUint16(ip[6:], 0x2000) // more fragments
		}
		copy(ip[12:], f.from.AsSlice())
		copy(ip[16:], f.to.AsSlice())
		var sum uint32
		for i := 0; i < 20; i += 2 {
			sum += uint32(binary.BigEndian.Uint16(ip[i:]))
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		binary.BigEndian.PutUint16(ip[10:], ^uint16(sum))
	} else {
		ethertype = unix.ETH_P_IPV6
		ip = make([]byte, 40)
		ip[0], ip[6], ip[7] = 0x60, f.proto, 64
		binary.BigEndian.PutUint16(ip[4:], uint16(len(udp)))
		copy(ip[8:], f.from.AsSlice())
		copy(ip[24:], f.to.AsSlice())
	}
	if f.ethertype != 0 {
		ethertype = f.ethertype
	}
	out := append(append([]byte{}, f.dst...), f.src...)
	if f.vlan {
		out = append(out, 0x81, 0, 0, 7)
	}
	out = binary.BigEndian.AppendUint16(out, ethertype)
	return append(append(out, ip...), udp...)
}

// inject sends a frame on eth0 of the network namespace of a process, as a
// program with CAP_NET_RAW in there could.
func inject(pid string, frame []byte) error {
	return rig.Enter(pid, func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: ifi.Index, Halen: 6})
	})
}

// hardwareAddr of eth0 in the network namespace of a process.
func hardwareAddr(t *testing.T, pid string) (mac net.HardwareAddr) {
	t.Helper()
	err := rig.Enter(pid, func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err == nil {
			mac = ifi.HardwareAddr
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return mac
}
