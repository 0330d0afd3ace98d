// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/netpol"
)

// TestHostListens: a port that a socket of this machine has, on whatever
// address, is not free for sandboxes.
func TestHostListens(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u, err := net.ListenPacket("udp", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	tcp := sandbox.Port{Host: uint16(l.Addr().(*net.TCPAddr).Port), Proto: netpol.TCP}
	udp := sandbox.Port{Host: uint16(u.LocalAddr().(*net.UDPAddr).Port), Proto: netpol.UDP}
	if !hostListens(tcp) || !hostListens(udp) {
		t.Errorf("listening: %t, %t", hostListens(tcp), hostListens(udp))
	}
	l.Close()
	u.Close()
	if hostListens(tcp) || hostListens(udp) {
		t.Errorf("closed: %t, %t", hostListens(tcp), hostListens(udp))
	}
}

func TestHostResolvers(t *testing.T) {
	dir := t.TempDir()
	for text, want := range map[string][]string{
		"":                                    nil,
		"search example.com\noptions edns0\n": nil,
		"nameserver 127.0.0.53\n":             {"127.0.0.53:53"},
		"# nameserver 192.0.2.1\n;nameserver 192.0.2.2\nnameserver\t2001:db8::53 \n": {"[2001:db8::53]:53"},
		"nameserver fe80::1%eth0\nnameserver not-an-address\nnameserver\n":           {"[fe80::1%eth0]:53"},
		"nameserver 192.0.2.1\nnameserver 192.0.2.2\nnameserver 192.0.2.3\nnameserver 192.0.2.4\n": {
			"192.0.2.1:53", "192.0.2.2:53", "192.0.2.3:53",
		},
	} {
		file := filepath.Join(dir, "resolv.conf")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := hostResolvers(file)
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%q: %v\n%s", text, err, diff)
		}
	}
	if got, err := hostResolvers(filepath.Join(dir, "none")); got != nil || err != nil {
		t.Errorf("without a file: %v, %v", got, err)
	}
	if _, err := hostResolvers(dir); err == nil {
		t.Error("a directory is read as a file")
	}
}
