// SPDX-License-Identifier: Apache-2.0

package link

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	sysctl4 = "/proc/sys/net/ipv4/"
	sysctl6 = "/proc/sys/net/ipv6/conf/"
)

// enableForwarding turns forwarding on where it is off. See Open.
func enableForwarding(linkPrefix string) error {
	if err := turnOn(sysctl4+"ip_forward", nil); err != nil {
		return err
	}
	return turnOn(sysctl6+"all/forwarding", func() error { return keepRouterAdverts(linkPrefix) })
}

// turnOn writes 1 unless the value is on already; before runs only then.
func turnOn(path string, before func() error) error {
	v, err := readSysctl(path)
	if err != nil {
		return err
	}
	if v != "0" {
		return nil
	}
	if before != nil {
		if err := before(); err != nil {
			return err
		}
	}
	return writeSysctl(path, "1")
}

// keepRouterAdverts lets the host's own interfaces go on heeding router
// advertisements once forwarding is on.
func keepRouterAdverts(linkPrefix string) error {
	paths, err := filepath.Glob(sysctl6 + "*/accept_ra")
	if err != nil {
		return err
	}
	for _, p := range paths {
		name := filepath.Base(filepath.Dir(p))
		if name == "all" || name == "default" || name == "lo" || strings.HasPrefix(name, linkPrefix) {
			continue
		}
		if v, err := readSysctl(p); err != nil || v != "1" {
			continue // gone meanwhile, or set by someone
		}
		if err := writeSysctl(p, "2"); err != nil {
			return err
		}
	}
	return nil
}

// insideSysctls sets the defaults for the links of the thread's namespace.
// It must run before a link comes into it.
func insideSysctls() error {
	for _, s := range [...]struct{ key, value string }{
		{"accept_ra", "0"}, {"accept_redirects", "0"}, {"autoconf", "0"},
		{"accept_dad", "0"}, {"dad_transmits", "0"},
	} {
		if err := writeSysctl(sysctl6+"default/"+s.key, s.value); err != nil {
			return err
		}
	}
	return nil
}

// linkSysctl is one sysctl of the host's end of a link.
type linkSysctl struct {
	name  string
	fam   int // AF_INET or AF_INET6
	id    int // its place in what the kernel tells of a link
	value int
}

// hostSysctls are those of the host's end. rp_filter is strict: the only
// route to the sandbox is this link. The IPv4 ones travel with the link, see
// hostSpec; netlink cannot set the others.
var hostSysctls = [...]linkSysctl{
	{"ipv4 forwarding", unix.AF_INET, devconfForwarding, 1},
	{"ipv4 rp_filter", unix.AF_INET, devconfRPFilter, 1},
	{"ipv4 proxy_arp", unix.AF_INET, devconfProxyARP, 0},
	{"ipv4 accept_redirects", unix.AF_INET, devconfAcceptRedirects, 0},
	{"ipv4 send_redirects", unix.AF_INET, devconfSendRedirects, 0},
	{"ipv4 accept_source_route", unix.AF_INET, devconfAcceptSourceRoute, 0},
	{"ipv4 route_localnet", unix.AF_INET, devconfRouteLocalnet, 0},
	{"accept_ra", unix.AF_INET6, devconf6AcceptRA, 0},
	{"accept_redirects", unix.AF_INET6, devconf6AcceptRedirects, 0},
	{"autoconf", unix.AF_INET6, devconf6Autoconf, 0},
	{"accept_dad", unix.AF_INET6, devconf6AcceptDAD, 0},
}

// hostLinkSysctls6 sets what netlink cannot set on the host's end.
func hostLinkSysctls6(name string) error {
	for _, s := range hostSysctls {
		if s.fam != unix.AF_INET6 {
			continue
		}
		if err := writeSysctl(sysctl6+name+"/"+s.name, strconv.Itoa(s.value)); err != nil {
			return err
		}
	}
	return nil
}

func readSysctl(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read sysctl: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// writeSysctl writes with bare system calls: it runs several times in every
// launch, and an os.File costs more than the write.
func writeSysctl(path, value string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("write sysctl: %w", &os.PathError{Op: "open", Path: path, Err: err})
	}
	_, err = unix.Write(fd, []byte(value))
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("write sysctl: %w", &os.PathError{Op: "write", Path: path, Err: err})
	}
	return nil
}
