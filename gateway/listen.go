// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/gateway/config"
	"github.com/bulkheadhq/bulkhead/gateway/ingest"
)

// maxConns bounds the connections of one address: every node, and some more.
const maxConns = ingest.MaxStreams + 256

// listenAll listens on every address or on none.
func listenAll(addrs []config.Address) (out []net.Listener, err error) {
	defer func() {
		if err != nil {
			closeAll(out)
		}
	}()
	for _, a := range addrs {
		var l net.Listener
		if a.Network == "unix" {
			l, err = listenUnix(a.Addr)
		} else {
			l, err = net.Listen(a.Network, a.Addr)
		}
		if err != nil {
			return out, fmt.Errorf("listen on %s: %w", a, err)
		}
		out = append(out, netutil.LimitListener(l, maxConns))
	}
	return out, nil
}

// listenUnix makes the socket with mode 0660. A socket that a gateway left
// behind is replaced; one that somebody listens on is not, nor is anything else
// that has the path.
func listenUnix(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode()&os.ModeSocket == 0:
		return nil, errors.New("there is a file that is not a socket")
	default:
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			conn.Close()
			return nil, errors.New("another process listens there")
		}
		if !errors.Is(err, unix.ECONNREFUSED) {
			return nil, fmt.Errorf("is another process listening there? %w", err)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	// The mode must be right from the first moment on.
	old := unix.Umask(0o117)
	defer unix.Umask(old)
	return net.Listen("unix", path)
}
