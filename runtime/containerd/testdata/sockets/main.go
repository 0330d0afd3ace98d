// SPDX-License-Identifier: Apache-2.0

// Command sockets prints the errno of socket(2) and socketpair(2), or 0, for
// each "call family type protocol" of its arguments.
package main

import (
	"fmt"
	"os"
	"syscall"
	"unsafe"
)

func main() {
	for _, arg := range os.Args[1:] {
		var call string
		var family, kind, protocol uintptr
		if _, err := fmt.Sscan(arg, &call, &family, &kind, &protocol); err != nil {
			fmt.Println(arg, err)
			continue
		}
		var fds [2]int32
		trap := map[string]uintptr{"socket": syscall.SYS_SOCKET, "socketpair": syscall.SYS_SOCKETPAIR}[call]
		// It ends soon: nothing is closed.
		_, _, errno := syscall.Syscall6(trap, family, kind, protocol, uintptr(unsafe.Pointer(&fds)), 0, 0)
		fmt.Println(arg, int(errno))
	}
}
