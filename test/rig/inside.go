// SPDX-License-Identifier: Apache-2.0

package rig

import (
	"net"
	"os"
	"path/filepath"
	"time"
)

// DialFrom tries a TCP connection from inside the network namespace of a
// process, as something in its sandbox would, without asking the agent.
func DialFrom(pid, address string, limit time.Duration) (reached bool, err error) {
	err = Enter(pid, func() error {
		// A plain Dial would start goroutines on other threads, which are not
		// in this namespace; with an IP address it connects on this one.
		c, err := net.DialTimeout("tcp", address, limit)
		if err == nil {
			reached = true
			return c.Close()
		}
		return nil
	})
	return reached, err
}

// Enter runs f in the network namespace of a process, on a thread of its own.
// Goroutines that f starts are not in it.
func Enter(pid string, f func() error) error {
	ns, err := os.Open(filepath.Join("/proc", pid, "ns/net"))
	if err != nil {
		return err
	}
	defer ns.Close()
	return inNetns(ns, f)
}
